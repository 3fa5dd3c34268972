"""What `cuflash demo`, `cuflash doctor` and `cuflash bench` run; `import cuflash` loads none of it."""
