"""The commands of ``manage.py``, one for each module."""
