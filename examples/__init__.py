"""Programs that use cuflash; each says in its first lines how it is run."""
