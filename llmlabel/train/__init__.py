"""Dataset with soft labels -> a model; every module here may run in many processes."""
