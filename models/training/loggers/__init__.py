"""Where a run's numbers go beside metrics.csv: Weights & Biases, TensorBoard, MLflow. conf/logger/ names these classes.

Each takes the config, the metrics, pictures and samples, and goes on in the same curve after an interruption:

resume(step, seen)           training begins at `step`; earlier processes have logged these metrics, by step
log_image(name, paths, step)
log_sample(prompt, text, step)

logger.py beside this folder calls them, and leaves one alone that fails. docs/logging.md is the page for users.
"""
