"""What ``lacuna site doctor`` and ``lacuna coordinator doctor`` look at."""
