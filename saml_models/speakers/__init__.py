"""Speaker profiles: files, a store, many speakers in a batch, identification."""
