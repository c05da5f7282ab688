"""Files written whole or not at all, JSON read strictly, the cache, progress bars."""
