"""How fast fastxent is: one table of cases, the providers that answer them, and what is made of the times."""
