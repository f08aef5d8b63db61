"""Login-node tools. Need neither torch nor deepspeed."""
