"""What routes and gradients tell about the tasks of a data set."""
