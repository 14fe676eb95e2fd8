"""Which tile configurations there are, what each is predicted or measured to cost, and which is best."""
