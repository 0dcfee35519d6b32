"""The machine and the processes: backend, devices, memory, files, versions."""
