"""The command `rba-compress`.

main                       the entry point
commands, latent_commands  one class a subcommand
demo, digits, images       the demo, and data
catalogue, coverage        networks by name, and every step tried on one
latent_demos/              trials of `rba-compress latent`
"""
