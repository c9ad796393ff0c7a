"""Steps, joins and collectives as TensorFlow traces them."""
