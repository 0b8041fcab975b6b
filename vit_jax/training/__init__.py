"""From a config to a trained model, and what comes after.

In the order in which one reads them:
  a run            loop, setup, starting, step, dispatch, optim, rules, mesh
  what guards it   checkpoint, workdir, lock, signals, processes
  what it tells    writers, trackers, reporting
  after it         trained, evaluation, predicting, serving, drawings, preview, exporting
  its speed        measuring, rows, comparing, cost, ahead
"""
