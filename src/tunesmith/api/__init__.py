"""The wire: parse, call one core or serving function, render."""
