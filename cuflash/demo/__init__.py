"""What the subcommands of `cuflash` run; `import cuflash` loads none of it."""
