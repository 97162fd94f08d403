"""What scripts/sign-update does, for an engineer's machine: keys, root documents, signed manifests, job documents."""
