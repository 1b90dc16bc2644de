"""From a public 135M transformer to two Kimi Linear models and what they score, as one graph of steps.

command -> graph -> scheduler; the steps that are no command of kimi-rl: workers; what came out: results, plot
"""
