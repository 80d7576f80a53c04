"""The recipe that made the base models in the box: corpus -> tokenizer -> packed tokens -> weights -> card."""
