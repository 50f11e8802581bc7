"""The pack under a fixed name, for mypy: in a clone its name is that of the folder."""
