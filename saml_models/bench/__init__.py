"""The benchmark: what is timed (cases), what runs it (contenders, peers), harness and report."""
