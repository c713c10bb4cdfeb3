"""What routes and gradients tell about the tasks of a data set. Imports `inference` and the rooms below it."""
