"""A registered version -> its files on this machine, each compared with the hashes in the version's tags."""
