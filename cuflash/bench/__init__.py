"""`cuflash bench`: speed, memory and host cost beside every peer found here; `import cuflash` loads none of it."""
