"""Measuring a trained model. A number is an ``Estimate``, and never travels without its protocol."""

from vaelab.evaluate.annealed import Annealing as Annealing
from vaelab.evaluate.annealed import ais_rows as ais_rows
from vaelab.evaluate.elbo import bound_protocol as bound_protocol
from vaelab.evaluate.elbo import evaluate as evaluate
from vaelab.evaluate.elbo import grey_floor as grey_floor
from vaelab.evaluate.elbo import protocol_of as protocol_of
from vaelab.evaluate.estimate import Estimate as Estimate
from vaelab.evaluate.importance import importance_rows as importance_rows
from vaelab.evaluate.importance import nll as nll
from vaelab.evaluate.reciprocal import reciprocal_nll as reciprocal_nll
