"""`python -m tnmoe`."""

from tnmoe.cli import main

main()
