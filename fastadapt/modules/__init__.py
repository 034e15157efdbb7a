"""Parameters, initialisation, state: the drop-in modules. They know nothing of any model library."""
