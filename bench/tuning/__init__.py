"""Searches tile configurations: lists candidates, predicts or times their cost, and picks the best."""
