"""What tests share: oracles, strategies and layers; no test is here."""
