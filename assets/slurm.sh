#!/bin/bash
# Trains on one node of 8 GPUs under SLURM, and goes on in a new job each time the time limit ends one: sbatch assets/slurm.sh
#SBATCH --nodes=1 --ntasks-per-node=1 --gpus-per-node=8 --cpus-per-task=64 --time=24:00:00
#SBATCH --requeue --open-mode=append --signal=B:USR1@120
trap 'kill -TERM $run; wait $run; scontrol requeue $SLURM_JOB_ID' USR1  # torchrun passes SIGTERM on to all ranks
torchrun --nproc_per_node=8 --max-restarts=3 main_pcl.py path/to/imagenet --amp --cos --exp-dir runs/imagenet --resume &
run=$!
wait $run
