"""The command `rba-compress`.

main                       the entry point
commands, latent_commands  one class a subcommand
demo, digits, images       its networks and data
catalogue, coverage        networks by name, and every step tried on one
latent_demos/              what `rba-compress latent` shows
"""
