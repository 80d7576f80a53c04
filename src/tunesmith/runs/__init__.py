"""From job to outcome: the dispatcher, where runs are executed, and the gate before a model is registered."""
