"""`store.watch`: which keys changed. `hints` says what this process wrote and hears what others say, `source`
reads what is watched, and `api` has the classes that users meet.

A hint only names keys. Events come from comparing two reads of the table, so a hint that is lost, late or
repeated costs time and never truth.
"""
