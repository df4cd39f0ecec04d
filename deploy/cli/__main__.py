"""``python -m deploy.cli`` is ``lacuna``."""

from deploy.cli.main import main

main()
