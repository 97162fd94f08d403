"""A camera in a virtual machine: Debian with systemd, two root slots, a boot loader that counts attempts, and RAUC."""
