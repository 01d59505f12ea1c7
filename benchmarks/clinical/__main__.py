from benchmarks.clinical.pipeline import main

main()
