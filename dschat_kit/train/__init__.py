"""The programs that `deepspeed` launches, one a stage: `deepspeed --module dschat_kit.train.ppo --run RUN/ppo`."""
