"""The command `rba-compress`.

main                       the entry point
options                    options of each subcommand, checked before torch is loaded
commands, latent_commands  one function a subcommand
demo, digits               the demo, and its data
images, texts              data of the user's
catalogue, coverage        networks by name, and every step tried on one
latent_demos/              trials of `rba-compress latent`
"""
