"""How good tuned models are: the sets, the measures, the methods that are compared, and the page of results."""
