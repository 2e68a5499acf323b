"""What every operator uses: devices, launch configurations, the registry, and the harness that tests and measures."""
