"""autoseg looks at labelled volume EM and at your machine, and decides, trains, predicts and scores.

The house, floors from top to bottom; a module imports only from floors below, the verbs never import each other::

    autoseg/
    ├── cli.py             THE DOOR: parse; nothing heavy is imported before a command runs
    ├── commands/          options → a call → text or JSON: planning.py · running.py · comparing.py · showing.py
    ├── arguments.py       what people type, as values
    ├── recipes/           SEVERAL VERBS IN A ROW
    │                      training.py (plan + DATA → RUN) · validate.py (predict + score) · demo.py · dev_run.py
    │                      speed.py (a plan for this machine) · profile.py (what a plan costs) · compare.py, ranking.py
    │
    ├── plan/              WHAT TO DO
    │                      fingerprint.py · crops.py (counts) · hardware.py · planner.py (order of the rules) · draft.py
    │                      rules_data.py · rules_split.py · rules_patch.py · rules_network.py · rules_loss.py
    │                      rules_sampling.py · rules_machine.py · cards.py (which GPUs) · rules_training.py
    │                      evidence.py, rules_scores.py (of a run) · extents.py (full patches) · weighting.py
    │                      resolution.py (groups of classes)
    │                      shipped.py · shrink.py (a smaller machine)
    │                      (each: value, because, source)
    ├── train/             DOING IT
    │                      turns.py (whose turn) · sources.py (a crop) · patches.py (batch of step s) · loader.py
    │                      augment.py · warp.py · defects.py · step.py · schedule.py
    │                      validation.py · thresholds.py · budget.py · loop.py · journal.py · signals.py
    │                      launch.py, team.py (several processes)
    ├── predict/           USING IT
    │                      volumes.py (what) · blocks.py (how) · ledger.py (what is done) · decode.py
    │                      export.py (TIFF, HDF5)
    ├── evaluate/          HOW GOOD IT IS
    │                      scores.py
    ├── report/            SHOWING IT
    │                      terminal.py data_tables.py comparison.py · page.py: artifacts.py results.py training.py
    │                      decisions.py sections.py panels.py figures.py html.py style.py palette.py png.py
    │
    ├── model/             THE MACHINE
    │                      networks.py · windows.py (inference) · memory.py (traced) · checkpoint.py
    │                      losses.py: targets.py voxels.py sums.py · groups.py softmax.py (exclusive classes)
    ├── metrics/           COUNTING
    │                      overlap.py (numpy in, counts out; no torch) · noise.py · verdicts.py
    ├── data/              WHAT THERE IS
    │                      dataset.py datasplit.py (the layout) · classes.py (three-valued logic)
    │                      codes.py (label codes, their cache) · coding.py (how they are made)
    │                      shapes.py (thickness, instances) · em.py greys.py (grey values) · integrity.py
    │                      resample.py · split.py islands.py
    │                      convert.py, writer.py (import) · synthetic.py
    │                      sanity.py (what looks wrong), traits.py (what of it is measured)
    │                      store/ (the only door to zarr): engine.py layout.py codecs.py sidecar.py
    │                      reading.py metadata.py pyramid.py
    │                      formats/ (the only door to TIFF, HDF5, ...): volume.py readers.py writers.py pairing.py
    │
    ├── schema/            every artifact as a frozen record
    │                      records.py · facts.py · plans.py · results.py · comparisons.py · files.py · checks.py
    │                      events.py
    ├── geometry.py        boxes, grids, tiles; lengths in nm
    ├── limits.py          threads and RAM that this process may use
    └── errors.py          DataError, PlanError, CheckpointError
"""

__version__ = "0.1.0"
