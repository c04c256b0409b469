"""Learning rules: what is minimised, and what of it is monitored."""

from vaelab.objectives.adversarial import AAE as AAE
from vaelab.objectives.adversarial import VAEGAN as VAEGAN
from vaelab.objectives.adversarial import Factor as Factor
from vaelab.objectives.aggregate import DIP as DIP
from vaelab.objectives.aggregate import BetaTC as BetaTC
from vaelab.objectives.chains import MCEM as MCEM
from vaelab.objectives.deterministic import RAE as RAE
from vaelab.objectives.elbo import ELBO as ELBO
from vaelab.objectives.elbo import BalancedELBO as BalancedELBO
from vaelab.objectives.elbo import Capacity as Capacity
from vaelab.objectives.elbo import FreeBits as FreeBits
from vaelab.objectives.importance import IWAE as IWAE
from vaelab.objectives.importance import PIWAE as PIWAE
from vaelab.objectives.importance import STL as STL
from vaelab.objectives.importance import DReG as DReG
from vaelab.objectives.importance import ThroughFew as ThroughFew
from vaelab.objectives.matching import MMD as MMD
from vaelab.objectives.objective import Group as Group
from vaelab.objectives.objective import Loss as Loss
from vaelab.objectives.objective import Objective as Objective
from vaelab.objectives.objective import common_parts as common_parts
from vaelab.objectives.objective import elbo_terms as elbo_terms
from vaelab.objectives.objective import sum_parts as sum_parts
from vaelab.objectives.objective import terms_as_defined as terms_as_defined
from vaelab.objectives.wake_sleep import WakeSleep as WakeSleep
