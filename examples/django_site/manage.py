"""A Django site whose cache, sessions and limits are in PostgreSQL, by pgkv.

    python examples/django_site/manage.py                        # starts a PostgreSQL of its own
    PGKV_DSN=postgresql://user@host/db python examples/django_site/manage.py

Then open http://127.0.0.1:8000 and log in as ada, password lovelace. Look at: the fragment of the
page that is made once in ten seconds for everybody; the login, which refuses the sixth guess of a
minute; the second browser, logged out from the first.

Every command of Django works: `manage.py check`, `manage.py pgkv doctor`.
"""

import os
import sys
import tempfile
from pathlib import Path

from pgkv import embedded

os.environ.setdefault("DJANGO_SETTINGS_MODULE", "settings")
sys.path.insert(0, str(Path(__file__).parent))


def main() -> None:
    """Run the command that was given, or prepare the database and serve the site."""
    from django.core.management import call_command, execute_from_command_line

    if len(sys.argv) > 1:
        execute_from_command_line(sys.argv)
        return
    import django

    django.setup()
    call_command("migrate", verbosity=0)
    from django.contrib.auth.models import User

    if not User.objects.filter(username="ada").exists():
        User.objects.create_user("ada", password="lovelace")  # noqa: S106  # yours is not in the source
    call_command("runserver", os.environ.get("ADDRESS", "127.0.0.1:8000"), use_reloader=False)


if __name__ == "__main__":
    if "PGKV_DSN" in os.environ:
        main()
    else:  # an embedded PostgreSQL, for as long as this runs
        with tempfile.TemporaryDirectory() as directory, embedded.start(directory) as server:
            os.environ["PGKV_DSN"] = server.dsn
            main()
