"""Machine and processes: backend, devices, memory, files, versions."""
