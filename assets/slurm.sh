#!/bin/bash
# Train on one SLURM node with 8 GPUs: sbatch assets/slurm.sh
# When the time limit comes near, the run saves and the job requeues itself.
#SBATCH --nodes=1 --ntasks-per-node=1 --gpus-per-node=8 --cpus-per-task=64 --time=24:00:00
#SBATCH --requeue --open-mode=append --signal=B:USR1@120
trap 'kill -TERM $run; wait $run; scontrol requeue $SLURM_JOB_ID' USR1  # torchrun passes SIGTERM to all ranks
torchrun --nproc_per_node=8 --max-restarts=3 main_pcl.py path/to/imagenet --amp --cos --exp-dir runs/imagenet --resume &
run=$!
wait $run
