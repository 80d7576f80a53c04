"""From text to choices: everything the engines need not know."""
