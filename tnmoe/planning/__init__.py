"""Plans: requests, limits, shortlists, and the calls that choose orders."""
