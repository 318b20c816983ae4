"""One finished run, told to a person: a page that needs nothing else, and a model card with the same facts."""
