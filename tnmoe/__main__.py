"""`python -m tnmoe`."""

from tnmoe.cli.main import main

main()
