"""What the Flower app bundle ships: two shims over the installed packages."""
