"""A machine and a repository -> whether a run can start, and a run that nothing left behind can stop."""
