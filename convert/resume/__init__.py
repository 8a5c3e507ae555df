"""What lets an interrupted conversion go on: the journal, the fingerprint of its inputs, saved states."""
