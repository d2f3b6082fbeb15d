"""The clauses of the contract, one module per subject."""
